"""Methods that choose among experts of attention; each file that registers a method is found by being here."""
