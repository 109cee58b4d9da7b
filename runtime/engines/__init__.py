"""Back ends: ways to run a component. `base.py` has the protocol, `registry.py` the choice."""
