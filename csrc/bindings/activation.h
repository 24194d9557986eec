#pragma once

#include <pybind11/pybind11.h>

namespace shrank {

void bind_activation(pybind11::module_ m);

}  // namespace shrank
