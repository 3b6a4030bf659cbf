"""Training of heads: `loop` is plain torch, `ray_train` runs it in a lane."""
