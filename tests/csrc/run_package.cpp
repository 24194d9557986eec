// run_package MODEL.pt2 INPUT OUTPUT ROWS COLUMNS: runs an AOTInductor package on float32 numbers from a file.
// No Python: the ops come from linking shrank::shrank.
#undef TORCH_TARGET_VERSION
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 6) {
    std::cerr << "usage: run_package MODEL.pt2 INPUT OUTPUT ROWS COLUMNS\n";
    return 2;
  }
  at::Tensor x = at::empty({std::stol(argv[4]), std::stol(argv[5])}, at::kFloat);
  std::ifstream(argv[2], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const at::Tensor y = model.run({x}).at(0).contiguous();
  std::ofstream(argv[3], std::ios::binary).write(static_cast<const char*>(y.data_ptr()), y.nbytes());
}
