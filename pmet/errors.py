"""The exceptions of the method.

Every message says what is wrong, where, and what to do about it. The tree is small:

    PMETError
    ├── InputError              an argument or input that cannot be used
    │   ├── RequestError            an edit request
    │   ├── HyperParameterError     a hyper-parameter file or value
    │   ├── ContextTemplateError    a list of context templates
    │   ├── ArchitectureError       a model whose parts cannot be named
    │   └── EditFileError           a saved edit that does not fit
    ├── NumericalError          the arithmetic failed
    │   ├── NotFiniteError          NaN or infinity
    │   └── NotPositiveDefiniteError  KᵀK + λC has no Cholesky factor
    └── OutOfMemoryError        not even one request fits into memory
"""


class PMETError(Exception):
    """Base of every exception raised on purpose by this package."""


class InputError(PMETError):
    """An argument or input cannot be used."""


class RequestError(InputError):
    """An edit request cannot be carried out; the message names the field and the remedy."""


class HyperParameterError(InputError):
    """A hyper-parameter file, key or value is wrong."""


class ContextTemplateError(InputError):
    """The context templates are not groups of strings with one ``{}`` each."""


class ArchitectureError(InputError):
    """The model's layers, projections, norm, head or cache are of no kind that is known."""


class EditFileError(InputError):
    """A saved edit is damaged or belongs to another model."""


class NumericalError(PMETError):
    """The arithmetic of the method failed."""


class NotFiniteError(NumericalError):
    """A tensor that must be finite holds NaN or infinity."""


class NotPositiveDefiniteError(NumericalError):
    """A matrix that must be positive definite is not."""


class OutOfMemoryError(PMETError):
    """Not even a single request fits into memory; the message names its lengths."""
