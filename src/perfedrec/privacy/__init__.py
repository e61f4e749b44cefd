"""Protection that is applied to each user's data before anything is summed or sent."""
