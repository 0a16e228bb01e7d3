"""What a run's model leaks: its own recipe trains the shadow models, `privacy.leakage` asks them.

A room above `recipe`, which knows all three packages: who was in the data (`membership`), images
from shared gradients (`gradients`), copies of the model (`copies`).
"""

from secure_cnn.leakage.boundary import BoundaryDistance
from secure_cnn.leakage.copies import ExtractionSettings, measure_extraction
from secure_cnn.leakage.earlier import Earlier, earlier
from secure_cnn.leakage.gradients import InversionSettings, Picture, measure_inversion
from secure_cnn.leakage.measure import LeakageSettings, Measured, measure_leakage
from secure_cnn.leakage.membership import MembershipSettings, others_asked
from secure_cnn.leakage.pools import FixedPool, GrowingPool, halves, noise_images
from secure_cnn.leakage.sharing import Sharing
from secure_cnn.leakage.student import StudentTraining
from secure_cnn.leakage.target import Target, target_of

__all__ = [
    "BoundaryDistance",
    "Earlier",
    "ExtractionSettings",
    "FixedPool",
    "GrowingPool",
    "InversionSettings",
    "LeakageSettings",
    "Measured",
    "MembershipSettings",
    "Picture",
    "Sharing",
    "StudentTraining",
    "Target",
    "earlier",
    "halves",
    "measure_extraction",
    "measure_inversion",
    "measure_leakage",
    "noise_images",
    "others_asked",
    "target_of",
]
