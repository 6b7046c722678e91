"""Writing out: the format of a converted model, what describes it, how it is published and how it reloads."""
