"""What every test shares."""

from hypothesis import settings

# The machine is shared with clusters under test: how long one example takes says nothing.
settings.register_profile("trunkline", deadline=None)
settings.load_profile("trunkline")
