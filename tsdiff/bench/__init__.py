"""What comparisons and studies of searches need: statistics with intervals, predictivity of verifiers, hacking reports."""
