"""The precision plan: how it is made, and what makes a graph compute as it says."""
