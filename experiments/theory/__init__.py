"""The paper's arguments on paper: toy landscapes, means, propositions, a regression."""
