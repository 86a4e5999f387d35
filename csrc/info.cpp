// sparsify_kernels._info: what the CPU kernels were built with and run on. Optional at run time.

#include <pybind11/pybind11.h>

#include <string>
#include <thread>

#include "common.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  features["sse4.2"] = __builtin_cpu_supports("sse4.2") != 0;
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  features["avx512vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
  features["avx512bf16"] = sparsify::has_pairs();
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "What the CPU kernels were built with and run on.";
  m.def("cpu_features", &cpu_features, "Which instruction set extensions this CPU has.");
  m.def("isa", [] { return std::string(sparsify::isa_name(sparsify::active_isa())); }, "The one in use.");
  m.def("threads", [] { return std::thread::hardware_concurrency(); }, "Hardware threads of this machine.");
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = SPARSIFY_BUILD_FLAGS;
  m.attr("source_hash") = SPARSIFY_SOURCE_HASH;
}
