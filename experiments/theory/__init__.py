"""What the paper shows on paper: toy landscapes, means, propositions, a regression."""
