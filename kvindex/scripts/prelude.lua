-- Functions that the scripts share. Put before each of them, after the key names of keys.py.
--
-- A set of slots is a string: of even length, ascending 2-byte slots; of odd length, a bitmap. The
-- shorter form is used, so one of up to 31 slots, or of any slots below 504, fits the 64 bytes that a
-- compactly encoded hash allows a value. In scripts it is an array of 32-bit words.
--
-- Buckets grow by linear hashing: with n buckets and p the largest power of two in n, a block is in
-- bucket hash % 2p, or p below where that bucket does not exist yet.
--
-- Fields of DIRECTORY: buckets, entries; members, dead, sweeping (sets of slots), cursor; version; expired
-- (reservations that nobody settled in time).

local band, bor, bnot, bxor, lshift = bit.band, bit.bor, bit.bnot, bit.bxor, bit.lshift
local floor = math.floor
local pack, unpack_from = struct.pack, struct.unpack

local ENTRIES_PER_BUCKET = 32
local PURGED_PER_CALL = 500
local MAX_SLOT = 65535
local WORD = 4294967296
local HASH_BYTES = 8

-- Layout of LIVE_ROW in keys.py: its size, where its charge and its load begin, what is before the load.
local ROW_BYTES = 76
local CHARGE_AT = 17
local LOAD_AT = 25
local LIVE_HEAD = '<dI4I4I4I4'
local NO_ROW = string.rep('\0', ROW_BYTES)

-- Lets a script that adds no data write even if Redis has reached its maxmemory: Redis refuses a script's
-- first write then, but none that follows a deletion, of whatever.
local function write_though_full()
  redis.call('HDEL', DIRECTORY, '')
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + floor(time[2] / 1000)
end

local function to_words(set)
  local words = {}
  local function put(slot)
    local index = floor(slot / 32) + 1
    for missing = #words + 1, index do
      words[missing] = 0
    end
    words[index] = bor(words[index], lshift(1, slot % 32))
  end
  if #set % 2 == 0 then
    for at = 1, #set, 2 do
      put((unpack_from('<I2', set, at)))
    end
    return words
  end
  local padded = set .. string.rep('\0', -#set % 4)
  for at = 1, #padded, 4 do
    words[#words + 1] = band(unpack_from('<I4', padded, at), -1)
  end
  return words
end

local function to_slots(words)
  local slots = {}
  for index, word in ipairs(words) do
    while word ~= 0 do
      local lowest = band(word, -word)
      local _, exponent = math.frexp(lowest % WORD)
      slots[#slots + 1] = 32 * (index - 1) + exponent - 1
      word = bxor(word, lowest)
    end
  end
  return slots
end

local function to_set(words)
  local slots = to_slots(words)
  if #slots == 0 then
    return ''
  end
  local num_bytes = floor(slots[#slots] / 8) + 1
  num_bytes = num_bytes + 1 - num_bytes % 2
  local parts = {}
  if 2 * #slots < num_bytes then
    for index, slot in ipairs(slots) do
      parts[index] = pack('<I2', slot)
    end
    return table.concat(parts)
  end
  for index, word in ipairs(words) do
    parts[index] = pack('<I4', word % WORD)
  end
  return (table.concat(parts) .. '\0'):sub(1, num_bytes)
end

local function set_of(slot)
  local words = {}
  for index = 1, floor(slot / 32) do
    words[index] = 0
  end
  words[#words + 1] = lshift(1, slot % 32)
  return words
end

local function union(left, right)
  local words = {}
  for index = 1, math.max(#left, #right) do
    words[index] = bor(left[index] or 0, right[index] or 0)
  end
  return words
end

local function intersection(left, right)
  local words = {}
  for index, word in ipairs(left) do
    words[index] = band(word, right[index] or 0)
  end
  return words
end

local function without(left, right)
  local words = {}
  for index, word in ipairs(left) do
    words[index] = band(word, bnot(right[index] or 0))
  end
  return words
end

local function read_set(name)
  return to_words(redis.call('HGET', DIRECTORY, name) or '')
end

local function write_set(name, words)
  redis.call('HSET', DIRECTORY, name, to_set(words))
end

local function power_within(num_buckets)
  local _, exponent = math.frexp(num_buckets)
  return 2 ^ (exponent - 1)
end

local function bucket_of(hash, num_buckets, power)
  local bucket = unpack_from('<I4', hash) % (2 * power)
  return bucket < num_buckets and bucket or bucket - power
end

local function bucket_key(bucket)
  return BUCKET .. pack('<I4', bucket)
end

local function write_bucket(bucket, flat)
  redis.call('DEL', bucket_key(bucket))
  if #flat > 0 then
    redis.call('HSET', bucket_key(bucket), unpack(flat))
  end
end

local function read_row(slot)
  local row = redis.call('GETRANGE', LIVE, slot * ROW_BYTES, (slot + 1) * ROW_BYTES - 1)
  return #row == ROW_BYTES and row or NO_ROW
end

local function write_row(slot, row)
  redis.call('SETRANGE', LIVE, slot * ROW_BYTES, row)
end

local function expiry_of(row)
  return (unpack_from('<d', row))
end

-- The owner of `slot` if it is `incarnation`, as {incarnation, sequence, count, digest}, or nothing.
local function own(slot, incarnation)
  local state = redis.call('HMGET', SLOT .. slot, 'incarnation', 'sequence', 'count', 'digest')
  return state[1] == incarnation and state or nil
end

-- Adds a line to the pool's log: a `PoolEvent` of history.py.
local function note_event(kind, slot, worker_id, incarnation, detail)
  redis.call('XADD', LOG, 'MAXLEN', '~', LOG_EVENTS, '*', 'kind', kind, 'slot', slot, 'worker', worker_id or '',
    'incarnation', incarnation or '', 'detail', detail)
end

local function fence(slot, kind, detail)
  local worker_id, incarnation = unpack(redis.call('HMGET', SLOT .. slot, 'worker_id', 'incarnation'))
  note_event(kind, slot, worker_id, incarnation, detail)
  redis.call('HDEL', IDS, worker_id or '')
  redis.call('DEL', SLOT .. slot, TAKEN .. slot)
  write_row(slot, NO_ROW)
  local members = without(read_set('members'), set_of(slot))
  write_set('members', members)
  if #to_slots(members) == 0 then
    redis.call('DEL', LIVE, PENDING)
  end
  write_set('dead', union(read_set('dead'), set_of(slot)))
  redis.call('HINCRBY', DIRECTORY, 'version', 1)
end

-- Adds to what `slot` is charged.
local function charge(slot, row, tokens, requests)
  local had_tokens, had_requests = unpack_from('<I4I4', row, CHARGE_AT)
  local charged = pack('<I4I4', had_tokens + tokens, had_requests + requests)
  redis.call('SETRANGE', LIVE, slot * ROW_BYTES + CHARGE_AT - 1, charged)
end

-- Takes a reservation back, once; false if there is none. The charge of a slot that has changed hands
-- since then is left alone.
local function settle(decision_id)
  local reservation = redis.call('HGET', RESERVATIONS, decision_id)
  if not reservation then
    return false
  end
  local slot, epoch, tokens = unpack_from('<I2I4I4', reservation)
  redis.call('HDEL', RESERVATIONS, decision_id)
  redis.call('ZREM', EXPIRY, decision_id)
  redis.call('ZREM', TAKEN .. slot, decision_id)
  local row = read_row(slot)
  if select(3, unpack_from('<dI4I4', row)) == epoch then
    charge(slot, row, -tokens, -1)
  end
  return true
end

local function purge(now)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', now, 'LIMIT', 0, PURGED_PER_CALL)) do
    if settle(id) then
      redis.call('HINCRBY', DIRECTORY, 'expired', 1)
    end
    redis.call('HDEL', PENDING, id)
  end
end

-- What was sent to be computed and is not known to be: PENDING_HEAD of keys.py and its samples, one after
-- the other, expired ones included.
local function pending()
  return table.concat(redis.call('HVALS', PENDING))
end

-- What every answer about the fleet ends with: time and registry version, the rows of all slots, and
-- the reservations in their charges that have expired but are not purged yet.
local function fleet(now)
  local version = tonumber(redis.call('HGET', DIRECTORY, 'version')) or 0
  local expired = redis.call('ZRANGEBYSCORE', EXPIRY, '-inf', now)
  for index, decision_id in ipairs(expired) do
    expired[index] = redis.call('HGET', RESERVATIONS, decision_id)
  end
  return pack('<dI4', now, version), redis.call('GET', LIVE) or '', table.concat(expired)
end
