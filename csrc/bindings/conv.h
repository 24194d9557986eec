#pragma once

#include <pybind11/pybind11.h>

namespace shrank {

void bind_conv(pybind11::module_ m);

}  // namespace shrank
