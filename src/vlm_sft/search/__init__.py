"""A sweep: trainings of one's own data with other settings, and which setting to take."""
