"""What a prediction rests on: attributions by captum, as tokens, pixels or features that can be read."""
