"""Quality measurement: recall tasks and scores."""
