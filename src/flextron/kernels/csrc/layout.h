// What the Python side mirrors, as text: `flextron_layout` returns it, and loading compares it (kernels/layout.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace {

struct Field {
    const char* name;
    size_t offset, size;
};

struct Value {
    const char* name;
    int64_t value;
};

inline std::string describe_struct(const char* name, size_t size, std::initializer_list<Field> fields) {
    std::string out = std::string("struct ") + name + " " + std::to_string(size);
    for (const Field& f : fields)
        out += std::string(" ") + f.name + ":" + std::to_string(f.offset) + "+" + std::to_string(f.size);
    return out + "\n";
}

inline std::string describe_enum(const char* name, size_t size, std::initializer_list<Value> values) {
    std::string out = std::string("enum ") + name + " " + std::to_string(size);
    for (const Value& v : values) out += std::string(" ") + v.name + ":" + std::to_string(v.value);
    return out + "\n";
}

inline std::string describe_constant(const char* name, int64_t value) {
    return std::string("constant ") + name + " " + std::to_string(value) + "\n";
}

}  // namespace

#define FIELD(type, field) Field{#field, offsetof(type, field), sizeof(type::field)}
