// The op schemas of the namespace mmkernels. Implementations: csrc/<family>/<family>_cpu.cpp (this library) and
// csrc/<family>/<family>_cuda.cpp (the CUDA library, which only adds implementations).
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(mmkernels, m) { mmk::define_schemas(m); }
