"""A recommender that learns from what its users did a moment ago."""
