"""Products of sparse matrices: three dataflows, the two products of masked attention, and what each of them moves."""

from scrimp.sparse.products.csr import CSR
from scrimp.sparse.products.dataflows import DATAFLOWS, spgemm
from scrimp.sparse.products.masked import attend, sddmm, softmax, spmm
from scrimp.sparse.products.traffic import Traffic

__all__ = ["CSR", "DATAFLOWS", "Traffic", "attend", "sddmm", "softmax", "spgemm", "spmm"]
