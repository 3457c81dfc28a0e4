"""A real object store on this machine, and faults put between it and its client."""
