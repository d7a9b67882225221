"""The small live world in which a campaign tries what detectors find (`holdfast campaign`)."""
