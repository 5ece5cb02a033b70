"""Allow torchvision's CUDA build to be imported together with a torch without CUDA.

The compiled half of that build needs the CUDA libraries. Next to a CPU build of torch it cannot be loaded, so nothing
declares the operators ``torchvision::nms`` and ``torchvision::qnms``. The Python half registers a shape function for
them when it is imported, and fails with "operator torchvision::nms does not exist". Models, datasets and transforms
need neither operator, so it is enough to declare the two schemas without an implementation. The compiled image decoders
and ``torchvision.ops`` stay unavailable.

Setup copies this file into the virtual environment's site-packages, if the plain import fails for this reason. A
``.pth`` file next to it imports it in every interpreter, including spawned workers. It adds one entry to
``sys.meta_path``, and does not import torch before torchvision is imported.
"""

import sys

# torchvision imports this module after it has tried to load its compiled half, and before it needs the operators.
TRIGGER = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """A meta-path finder that never finds a module; it declares the operators at the right moment."""

    library = (
        None  # torch removes the schemas when the Library object is deleted, so it is kept here
    )

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Declare the operators when ``TRIGGER`` is imported; other finders then find the module."""
        if name == TRIGGER:
            cls.declare()

    @classmethod
    def declare(cls) -> None:
        """Declare the missing operators; none are missing if the compiled half could be loaded."""
        import torch

        known = torch.ops.torchvision
        missing = [schema for schema in SCHEMAS if not hasattr(known, schema.split("(")[0])]
        if missing and cls.library is None:
            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in missing:
                cls.library.define(schema)


if DeclareOperators not in sys.meta_path:
    sys.meta_path.insert(0, DeclareOperators)
