#pragma once

#include <pybind11/pybind11.h>

namespace shrank {

void bind_select_linear(pybind11::module_ m);
void bind_select_conv(pybind11::module_ m);

}  // namespace shrank
