"""Right weights and full-batch steps in other trainers; each module imports its library itself."""
