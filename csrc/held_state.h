// Whether an optimizer still holds the parameters and state tensors that a step plan was made for, and which gradients
// they have now. Done on Python's objects in C++: for 400 parameters the same in Python costs more than their update.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "owned_handles.h"

namespace pyft {

class HeldState {
 public:
  // params: the parameters with a gradient, groups: the number of the group of each, state: the optimizer's, parameter
  // to dict. keys: a tuple for each parameter, the names of the state tensors that the plan uses. handles: of `params`.
  HeldState(const pybind11::list& params, std::vector<int64_t> groups, const pybind11::dict& state,
            const pybind11::list& keys, OwnedHandles handles);

  // The gradients, in the order of `params`; None when the parameters that have one, their groups or any tensor of
  // their state are not those of the plan.
  // With `same_state` the state is known to be theirs.
  pybind11::object gradients(const pybind11::list& param_groups, const pybind11::dict& state, bool same_state);

  // Views of the gradients, if `grads` is what the last call of gradients() gave; else null.
  const std::vector<TensorView>* views_of(const pybind11::list& grads) const;

  // Calls increment(block) for each tuple of parameters. `blocks` are `params` in order, all but the last of one size.
  void increment_versions(const pybind11::object& increment, const pybind11::list& blocks) const;

 private:
  bool has_state(const pybind11::dict& state) const;
  void fetch(size_t next) const;

  // References are owned: an address alone could belong to another object by now.
  std::vector<pybind11::object> params_;
  std::vector<int64_t> groups_;
  std::vector<pybind11::object> every_state_;
  std::vector<pybind11::dict> states_;
  // Of `params`; and where their gradients were in the last step, to be fetched, never to be read.
  OwnedHandles handles_;
  std::vector<Record> records_;
  std::vector<const void*> last_grads_;
  // Of the list that was given last, whose address alone is kept, so that nothing holds the gradients.
  std::vector<TensorView> views_;
  const void* last_list_ = nullptr;
  // All values of all of these dicts, in their order: looking keys up would take several times as long.
  std::vector<pybind11::object> held_;
};

}  // namespace pyft
