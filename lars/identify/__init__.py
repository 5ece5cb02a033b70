"""Which published rule is this optimizer?

``python -m lars.identify package.module:Class`` runs a torch optimizer and every named rule of this library on the same
gradients. It prints the rule that the optimizer equals, or the nearest rule and the first step and tensor where they
part. The parts:

- `trial`: the weights, gradients and learning rates, and how an optimizer moves the weights.
- `candidate`: the class that the user names, its constructor and its hyper-parameters.
- `references`: the named rules.
- `compare`: which moves agree, and where two rules first differ.
- `measure`, `probes`: measurements of single properties, such as the denominator of the ratio.
- `verdict`: the comparison with all rules.
- `report`: the text and the JSON.
"""
