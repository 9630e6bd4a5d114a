"""Several runs in one pass over one frozen encoder."""
