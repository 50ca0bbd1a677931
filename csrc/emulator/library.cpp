// The emulator library: the schemas once more, for the CUDA bindings compiled for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(mmkernels_emulator, m) { mmk::define_schemas(m); }
