"""What a trained network is worth, each question a function of weights and recordings."""
