// Whether an optimizer still holds the parameters and state tensors that a step plan was made for, and which gradients
// they have now. Done on Python's objects in C++: for 400 parameters the same in Python costs more than their update.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace pyft {

class HeldState {
 public:
  // params: the parameters with a gradient, groups: the number of the group of each, state: the optimizer's, parameter
  // to dict. keys: a tuple for each parameter, the names of the state tensors that the plan uses.
  HeldState(const pybind11::list& params, std::vector<int64_t> groups, pybind11::dict state,
            const pybind11::list& keys);

  // The gradients, in the order of `params`; None when the parameters that have one, their groups or any tensor of
  // their state are not those of the plan.
  pybind11::object gradients(const pybind11::list& param_groups, const pybind11::dict& state) const;

 private:
  bool same_state(const pybind11::dict& state) const;

  // References are owned: an address alone could belong to another object by now.
  std::vector<pybind11::object> params_;
  std::vector<int64_t> groups_;
  std::vector<pybind11::object> every_state_;
  std::vector<pybind11::dict> states_;
  // All values of all of these dicts, in their order: looking keys up would take several times as long.
  std::vector<pybind11::object> held_;
};

}  // namespace pyft
