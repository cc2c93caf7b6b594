"""Where a model's attention goes: what its heads look at, which find things far back, and what that suggests."""

from kvfold.quality.profile.results import Profile
from kvfold.quality.profile.run import Plan, profile_model, run_profile

__all__ = ["Plan", "Profile", "profile_model", "run_profile"]
