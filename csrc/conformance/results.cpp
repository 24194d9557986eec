#include "results.h"

#include <fstream>
#include <iomanip>
#include <stdexcept>

namespace shrank::conformance {

void write(const std::string& path, const Machine& machine, const std::vector<Result>& results) {
  std::ofstream file(path);
  file << "{\n \"device\": \"" << machine.device << "\",\n \"arch\": \"" << machine.arch << "\",\n \"driver\": \""
       << machine.driver << "\",\n \"cuda\": \"" << machine.cuda << "\",\n \"results\": {";
  file << std::hex << std::setfill('0');
  const char* separator = "\n";
  for (const Result& result : results) {
    file << separator << "  \"" << result.name << "\": [";
    for (std::size_t i = 0; i < result.output.size(); i++)
      file << (i == 0 ? "\n   \"" : i % 8 == 0 ? "\",\n   \"" : " ") << std::setw(8) << result.output[i];
    file << "\"]";
    separator = ",\n";
  }
  file << "\n }\n}\n";
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace shrank::conformance
