// The few words of JSON that are needed here.
#pragma once

#include <array>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

namespace shrank {

inline std::string json(std::string_view text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return quoted + '"';
}

inline std::string json(const char* text) { return json(std::string_view(text)); }
inline std::string json(bool value) { return value ? "true" : "false"; }
inline std::string json(int value) { return std::to_string(value); }
inline std::string json(int64_t value) { return std::to_string(value); }

inline std::string json(double value) {
  std::array<char, 32> digits;  // the shortest that reads back as the same number; no locale has a say
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}

class Object {
 public:
  Object& add(const char* key, const std::string& value) {
    members_.append(members_.empty() ? "" : ", ").append(json(key)).append(": ").append(value);
    return *this;
  }

  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string members_;
};

template <typename Numbers> std::string json_list(const Numbers& numbers) {
  std::string listed;
  for (const auto& number : numbers) listed.append(listed.empty() ? "" : ", ").append(json(number));
  return "[" + listed + "]";
}

}  // namespace shrank
