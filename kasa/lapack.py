"""LAPACK on fp64 matrices of torch on the CPU, without holding Python's global lock: weights are decomposed in threads.

scipy's own functions hold the lock for as long as they compute. The routines are those of scipy's BLAS library, which needs
half the time of torch's for these.
"""

from __future__ import annotations

import ctypes
from typing import Any

import scipy.linalg.cython_lapack
import torch

_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _routine(name: str) -> Any:
    capsule = scipy.linalg.cython_lapack.__pyx_capi__[name]
    count = _name_of(capsule).count(b"*")
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(_address_of(capsule, _name_of(capsule)))


_dpotrf, _dsyevr = _routine("dpotrf"), _routine("dsyevr")


def cholesky(matrix_KK: torch.Tensor) -> torch.Tensor | None:
    """The lower factor of a symmetric matrix, or None where it is not positive definite."""
    # LAPACK reads columns first, and so sees the lower triangle of a row-first matrix as the upper one.
    factor_KK = matrix_KK.clone(memory_format=torch.contiguous_format)
    info = _int(0)
    _call(_dpotrf, b"U", _int(len(factor_KK)), factor_KK, _int(len(factor_KK)), info)
    return None if info.value else factor_KK.tril_()


def bottom_eigenvectors(matrix_KK: torch.Tensor, count: int) -> torch.Tensor:
    """The eigenvectors of the `count` smallest eigenvalues of a symmetric matrix, ascending, as (K, count).

    Raises:
        RuntimeError: the iterations do not converge (NaN or Inf in the matrix).
    """
    side = len(matrix_KK)
    scratch_KK = matrix_KK.clone(memory_format=torch.contiguous_format)
    values_K = torch.empty(side, dtype=torch.float64)
    vectors_RK = torch.empty(count, side, dtype=torch.float64)
    support = torch.empty(2 * side, dtype=torch.int32)
    found, info, unused = _int(0), _int(0), ctypes.c_double(0)

    def call(work: torch.Tensor, work_size: int, integers: torch.Tensor, integer_size: int) -> None:
        _call(
            _dsyevr, b"V", b"I", b"U", _int(side), scratch_KK, _int(side), unused, unused, _int(1), _int(count), unused,
            found, values_K, vectors_RK, _int(side), support, work, _int(work_size), integers, _int(integer_size), info,
        )  # fmt: skip

    sizes = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.int32)
    call(sizes[0], -1, sizes[1], -1)
    work, integers = (torch.empty(int(size), dtype=size.dtype) for size in sizes)
    call(work, len(work), integers, len(integers))
    if info.value or found.value != count:
        raise RuntimeError(f"LAPACK's dsyevr found {found.value} of {count} eigenvectors (info {info.value})")
    return vectors_RK.T


_int = ctypes.c_int


def _call(routine: Any, *arguments: Any) -> None:
    """Call by reference: tensors by their data, numbers by their address, letters as they are."""
    routine(*[_reference(argument) for argument in arguments])


def _reference(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, bytes) else ctypes.addressof(argument)
