// Tensors of Python looked at in place. A handle for each, made and dropped again, costs more than a look.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "owned_handles.h"

namespace pyft {

// A view of a tensor of exactly the class torch.Tensor, on the CPU, through DLPack's exchange table (DLPack 1.3).
// False: it is something else, or DLPack does not know it.
bool look_through(PyObject* tensor, TensorView& view);

// Begins to load what look_through will read of a torch.Tensor that is in the cache itself.
void fetch_record(PyObject* tensor);
void fetch_storage(PyObject* tensor);

// Views of all tensors of a list; through handles, which are kept here, where look_through fails. Valid as long as the
// list holds the same tensors.
class PythonTensors {
 public:
  explicit PythonTensors(const pybind11::list& tensors);

  const std::vector<TensorView>& views() const { return views_; }

 private:
  std::vector<TensorView> views_;
  std::vector<OwnedHandles> handles_;
};

}  // namespace pyft
