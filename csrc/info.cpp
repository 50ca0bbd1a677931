// A small Python module without torch symbols: it loads where the kernel libraries cannot, and says what they would
// need.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common/isa.h"
#include "common/waves.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::list supported;
  for (mmk::Isa isa : {mmk::Isa::kBase, mmk::Isa::kV3, mmk::Isa::kV4})
    if (isa <= mmk::supported_isa()) supported.append(mmk::isa_name(isa));
  py::dict features;
  features["supported"] = supported;
  features["vendor"] = mmk::cpu_vendor();
  features["chosen"] = mmk::isa_name(mmk::chosen_isa());
  return features;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["cpp_standard"] = __cplusplus;
  facts["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return facts;
}

int64_t split_keys(int64_t tiles, int64_t blocks, int64_t slots) {
  if (tiles < 0 || blocks < 0) throw std::invalid_argument("tiles and blocks must not be negative");
  if (slots < 1) throw std::invalid_argument("slots must be positive");
  return mmk::split_keys(tiles, blocks, slots);
}

}  // namespace

PYBIND11_MODULE(_C_info, m) {
  m.doc() = "Build facts, CPU features and the split planner of the native libraries.";
  m.def("cpu_features", &cpu_features, "Instruction sets that this CPU supports, and the one that the kernels use.");
  m.def("build_facts", &build_facts, "Compiler, C++ standard and pybind11 version of this module.");
  m.def("split_keys", &split_keys, py::arg("tiles"), py::arg("blocks"), py::arg("slots"),
        "The split planner of the C++ launchers; equal to mmkernels.ops._shared.waves.split_keys.");
}
