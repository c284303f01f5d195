"""The pure core: values and decisions, standard library only. No clock, no file, no socket."""
