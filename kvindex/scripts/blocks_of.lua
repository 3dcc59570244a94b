-- Reads the part of a slot's blocks whose hashes have one remainder. Writes nothing.
--
-- The parts are as many as make one 4 to 7 buckets. Their number is a power of two within the number of
-- buckets, so a part is whole buckets: those with the same remainder.
--
-- KEYS[1]  directory of the pool
-- ARGV     slot, incarnation, turn: a number that counts the calls
-- Returns  {part, which is the turn modulo the parts; number of parts; hashes, 8 bytes each}; false if the
--          slot is not this incarnation's

local BUCKETS_PER_PART = 4

local slot, incarnation, turn = unpack(ARGV)
if not own(slot, incarnation) then
  return false
end
local num_buckets = tonumber(redis.call('HGET', DIRECTORY, 'buckets')) or 1
local num_parts = math.max(1, power_within(num_buckets) / BUCKETS_PER_PART)
local part = tonumber(turn) % num_parts
local index, bit_of_slot = floor(slot / 32) + 1, lshift(1, slot % 32)
local has_slot, hashes = {}, {}

for bucket = part, num_buckets - 1, num_parts do
  local flat = redis.call('HGETALL', bucket_key(bucket))
  for at = 1, #flat, 2 do
    local set = flat[at + 1]
    if has_slot[set] == nil then
      has_slot[set] = band(to_words(set)[index] or 0, bit_of_slot) ~= 0
    end
    if has_slot[set] and #flat[at] == HASH_BYTES then
      hashes[#hashes + 1] = flat[at]
    end
  end
end
return {part, num_parts, table.concat(hashes)}
