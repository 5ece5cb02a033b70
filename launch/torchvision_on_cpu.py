"""Let torchvision's CUDA-linked wheel be imported beside a torch without CUDA.

The wheel's compiled half needs the CUDA libraries. Beside a CPU torch it cannot be loaded, so
nobody declares the operators ``torchvision::nms`` and ``torchvision::qnms``; torchvision's Python
half then registers a shape function for them at import and fails with "operator torchvision::nms
does not exist". Models, datasets and transforms need neither operator: declaring the two schemas,
without an implementation, is enough. Compiled image decoding and ``torchvision.ops`` stay
unavailable.

launch/setup.sh copies this file into the virtual environment's site-packages with a ``.pth`` file
that imports it in every interpreter (workers that were spawned included), and only where the plain
import fails for that reason. It costs a new interpreter one entry in ``sys.meta_path``; torch is
not imported until torchvision is.
"""

import sys

# torchvision imports this after it has tried to load its compiled half and before it needs the
# operators.
TRIGGER = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """A meta-path finder that finds nothing: it only declares the operators at the right moment."""

    library = None  # torch forgets the schemas with the Library object, so it is kept here

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Declare the operators when ``TRIGGER`` is looked for; leave the finding to others."""
        if name == TRIGGER:
            cls.declare()

    @classmethod
    def declare(cls) -> None:
        """Declare what is missing: nothing where the compiled half could be loaded after all."""
        import torch

        known = torch.ops.torchvision
        missing = [schema for schema in SCHEMAS if not hasattr(known, schema.split("(")[0])]
        if missing and cls.library is None:
            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in missing:
                cls.library.define(schema)


if DeclareOperators not in sys.meta_path:
    sys.meta_path.insert(0, DeclareOperators)
