"""Train a head on 200 labelled digits and predict 100 others. Start a cluster first: `trunkline up`."""

import trunkline
from sklearn.datasets import load_digits

digits = load_digits()
images = (digits.images * 15.9375).astype("uint8")  # arrays of uint8, PIL images or paths

client = trunkline.connect()  # finds the cluster that `trunkline up` started
stem = client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)  # fetched once, runs here
data = client.upload(images[:200], digits.target[:200], name="digits", stem=stem)
model = client.train(data, name="digits-head").result()
prediction = model.predict(images[200:300])
print(prediction.labels[:10], "right:", digits.target[200:210])
