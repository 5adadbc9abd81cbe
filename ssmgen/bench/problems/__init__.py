"""The problems of each family; `ssmgen.bench.problem.make` finds them by the family's name."""
