"""What a sparse method is made of: how keys are summed up, scored and chosen. Pure functions and frozen options."""
