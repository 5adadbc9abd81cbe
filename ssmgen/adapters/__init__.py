"""Functions with the names and argument orders of other libraries, on the ops of this one."""
