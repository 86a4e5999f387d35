// sparsify_kernels._C: the CPU kernels of every op. Importing it changes nothing; register() puts the kernels into
// torch's dispatcher, once the caller has seen by source_hash that they are those of the sources at hand. torch must be
// imported first.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <exception>

#include "common.h"

namespace {

PyObject* register_kernels(PyObject*, PyObject*) {
  try {
    static sparsify::Library library(sparsify::Library::Kind::IMPL, "sparsify_kernels", "CPU", __FILE__, __LINE__);
    static const bool registered = [] {
      sparsify::register_attention_scores(library);
      sparsify::register_key_tokens(library);
      sparsify::register_merge_tokens(library);
      sparsify::register_random_mask(library);
      sparsify::register_window_attention(library);
      return true;
    }();
    static_cast<void>(registered);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"register", register_kernels, METH_NOARGS, "Make torch's dispatcher use these kernels for CPU tensors."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "source_hash", SPARSIFY_SOURCE_HASH) < 0 ||
      PyModule_AddStringConstant(module, "isa", sparsify::isa_name(sparsify::active_isa())) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
