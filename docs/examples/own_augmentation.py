"""Train with an augmentation of your own beside those that there are.

It takes a sample and a random generator, and returns another sample. Whatever it draws from the
generator is the same for any number of processes and loaders, and again when a run is resumed.
"""

import cv2
import numpy as np
import visiontrain as vt


def out_of_focus(sample, random):
    """Blur a third of the pictures, as a microscope does that is out of focus."""
    if random.random() > 1 / 3:
        return sample
    image = cv2.GaussianBlur(sample.image, (0, 0), sigmaX=random.uniform(0.5, 2.0))
    return vt.Sample(np.asarray(image), sample.classes, sample.boxes)


run = vt.train(data="tiny", augment=out_of_focus, epochs=2, batch=8)
print(f"val mAP50-95 {run.metrics['map']:.3f}")
