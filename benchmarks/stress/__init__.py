"""Many random problems for every operator that solves one, each answer checked again by other means."""
