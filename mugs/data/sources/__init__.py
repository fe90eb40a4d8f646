"""Where images come from, and how data sets are converted and checked."""
