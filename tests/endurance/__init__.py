"""What shows with time: floods, kills, idle hours, soaks. Each is short in the suite and has a long form (Makefile)."""
