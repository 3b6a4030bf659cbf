"""How jobs are told to trackers. What users name is in ``trunkline.track``."""
